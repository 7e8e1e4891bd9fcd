"""Training apps, each on its own: no app imports another, and nothing lives here."""
