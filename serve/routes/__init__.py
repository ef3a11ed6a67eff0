"""HTTP: each module a resource. Handlers check, call the service, and answer."""
