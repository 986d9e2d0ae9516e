"""What the tests stand on: database servers, web servers in child processes, clients that misbehave."""
