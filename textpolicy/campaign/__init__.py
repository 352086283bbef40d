"""Campaigns: arms x seeds x overrides over one base configuration, and what they show. Offline but for the runs."""
