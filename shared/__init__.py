"""What several apps need and must not get wrong; nothing here knows an app."""
