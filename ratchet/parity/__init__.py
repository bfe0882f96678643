"""Checks that trainer, gateway and merged model say the same."""
