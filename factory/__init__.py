"""factory: anime video to a captioned line-art dataset in Lance tables."""
