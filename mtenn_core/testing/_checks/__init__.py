"""The checks of the conformance suite, one file per subject."""
