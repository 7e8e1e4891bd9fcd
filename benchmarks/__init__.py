"""Measurements against re-statements of the usual arrangement: no part of the tests, never reached from an app."""
