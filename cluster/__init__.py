"""cluster: where it runs: local demo cluster, Ray cluster launcher, KubeRay."""
