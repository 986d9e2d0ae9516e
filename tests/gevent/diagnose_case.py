# ruff: noqa: T201, DTZ
"""What the diagnosis says of a playhouse pool alone, in a process of its own; see matrix_case.py for the arguments."""

import json
import os
import sys
import warnings

order, driver = sys.argv[1:3]
warnings.simplefilter("ignore")

from gevent import monkey

if order == "without threads":
    monkey.patch_all(thread=False)

from playhouse import db_url, pool

url = os.environ["MYSQL_URL" if driver == "pymysql" else "POSTGRES_URL"]
cls = pool.PooledMySQLDatabase if driver == "pymysql" else pool.PooledPostgresqlDatabase
more = {} if driver == "pymysql" else {"prefer_psycopg3": True}
database = cls(**db_url.parse(url), **more)
if order == "created first":
    monkey.patch_all()

from peewee_frameworks.errors import GeventNotPatched
from peewee_frameworks.gevent import check, diagnose

try:
    check(database)
except GeventNotPatched as error:
    refused = str(error)
else:
    refused = ""
print(json.dumps({"findings": [(finding.code, finding.level) for finding in diagnose(database)], "refused": refused}))
