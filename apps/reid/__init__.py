"""reid: person re-identification across RGB, near infra-red, colour pencil, sketch and text."""
