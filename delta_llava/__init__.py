"""What starts without torch and transformers: the command line and its errors."""
