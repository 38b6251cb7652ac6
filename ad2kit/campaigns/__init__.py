"""Campaigns drive stages; nothing but the command line drives a campaign."""
