"""What a file that was written loses against the run it was made of, by running it in the program it is for."""
