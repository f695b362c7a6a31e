"""The APIs of others: OpenAI's and A1111's."""
