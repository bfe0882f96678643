"""`up`, `down`, `doctor`, `status`: processes and ports."""
