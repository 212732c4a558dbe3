"""Launchers start processes and watch them: local, Ray, by hand. The only importer of ray."""
