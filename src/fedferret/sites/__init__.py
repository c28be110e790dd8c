"""Runs across organisations: certificates, the server's port, and the commands of the server and of the sites."""
