"""The HTTP side: OpenAI's API on top of an engine client."""
