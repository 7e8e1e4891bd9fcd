"""The project beside installable peers, each in its own virtual environment: no part of the tests."""
