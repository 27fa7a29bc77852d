"""What the operating system gives: files, devices, memory, the console."""
