"""Our own API over HTTP, and what all APIs share: jobs, limits, guards, the gallery, figures, the OpenAPI document."""
