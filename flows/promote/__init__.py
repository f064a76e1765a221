"""Promote: a registered candidate becomes the champion, on a command or on somebody's word."""
