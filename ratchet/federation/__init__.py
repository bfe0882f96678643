"""Training together without sharing rows: what nodes exchange, and how their updates become one."""
