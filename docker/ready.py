"""The images' health check: exit status 0 where the service in this container is ready. Needs no curl."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("ENCNET_PORT") or 8000), timeout=4)
try:
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
    print(answer.status, answer.read().decode())
except OSError as error:
    sys.exit(f"no answer: {error}")
sys.exit(answer.status != 200)
