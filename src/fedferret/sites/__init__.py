"""Running across organisations: certificates, the port, and the commands of the server and of the sites."""
