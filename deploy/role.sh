#!/bin/sh
# At PostgreSQL's first start: the role that the API runs as. `flask db grant` says what it may do.
psql -X -v ON_ERROR_STOP=1 -v password="$(cat /run/secrets/api_password)" \
    -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
CREATE ROLE shop_api LOGIN PASSWORD :'password';
SQL
