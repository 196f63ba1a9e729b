"""What every implementation of a port must do: classes of tests, to be inherited with a fixture for the subject."""
