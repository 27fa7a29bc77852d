"""One file a method; ``base`` says what a method declares and returns."""
