"""What starts without torch and transformers: the command line, its errors, and the process that uploads."""
