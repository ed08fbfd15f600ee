{{/* A selector in PromQL of this release's pods: their names have a fixed shape, so that no other release's match. */}}

{{- define "loraplex.podPattern" -}}
{{- $shape := ternary "[a-z0-9]{4,10}-[a-z0-9]{5}" "[0-9]+" (eq .Values.workload.kind "Deployment") -}}
{{- printf "{namespace=\"%s\",pod=~\"%s-%s\"}" .Release.Namespace (include "loraplex.fullname" .) $shape -}}
{{- end -}}
