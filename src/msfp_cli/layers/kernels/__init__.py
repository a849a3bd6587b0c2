"""Ways to execute a quantized layer: one file each; `registry` lists them and picks, `kernel` says what one is."""
