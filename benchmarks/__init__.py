"""Measurements against re-statements of the usual arrangement; not part of the test suite, never reached from an app."""
