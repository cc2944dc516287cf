"""Feature collections of others: in and out of the bank, with what is lost on the way."""
