"""serving: an adapter to pictures over HTTP."""
