"""Dashboards and alerts on Reknit's metrics, as values; what Grafana and Prometheus read is made of them."""
