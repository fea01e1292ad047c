// Package monitoring has what Prometheus and Grafana need to watch appliances: alert rules, recording rules and a dashboard. They are files
// of their own, so that they can be read and changed; the appliance prints them:
//
//	varve monitoring rules > /etc/prometheus/varve.yml          promtool check rules takes it
//	varve monitoring dashboard > varve.json                      Grafana: Dashboards, Import; it asks for the data source
//	varve monitoring scrape                                      the scrape configuration of this cluster
//
// Every alert has a code of varve doctor --codes as its label `check`, where there is one, and a remedy. A test starts an appliance and
// finds every name that rules and dashboard use among its metrics.
package monitoring

import _ "embed"

// Rules are Prometheus's.
//
//go:embed rules.yaml
var Rules string

// Dashboard is Grafana's.
//
//go:embed dashboard.json
var Dashboard string
