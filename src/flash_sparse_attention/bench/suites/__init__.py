"""The suites of `fsa bench`: which cases there are, and the reference of each."""
