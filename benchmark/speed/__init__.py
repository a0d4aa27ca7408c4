"""Our own speed: where the service's time goes, and against what."""
