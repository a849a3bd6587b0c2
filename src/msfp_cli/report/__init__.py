"""One HTML page: `document` gathers what is known, `page` draws it, `plots` makes PNG files, `reproduce` the commands."""
