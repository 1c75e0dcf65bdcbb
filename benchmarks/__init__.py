"""Side-by-side measurements; every figure that README quotes comes from a command here."""
