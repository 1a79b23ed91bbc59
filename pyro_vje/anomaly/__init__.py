"""Which image is strange: scores, likelihood parts, from images to rows to table."""
