{{/* How servers are replaced. A new one needs the GPU of the old one; and what shares its state must end before. */}}

{{- define "loraplex.strategy" -}}
{{- if .Values.strategy -}}
{{- toYaml .Values.strategy -}}
{{- else if eq (include "loraplex.stateType" .) "claim" -}}
type: Recreate
{{- else -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: 0
  maxUnavailable: 1
{{- end -}}
{{- end -}}
