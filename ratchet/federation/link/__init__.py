"""How coordinator and nodes reach each other: certificates, invitations, Flower's processes."""
