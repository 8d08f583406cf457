"""What joins operations: a study may use all of them, and none prints or knows the command line."""
