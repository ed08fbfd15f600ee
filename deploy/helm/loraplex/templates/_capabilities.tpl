{{/* API versions: of what the cluster offers, and of the version it has where that is only told by --kube-version. */}}

{{- define "loraplex.policyApi" -}}
{{- if and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21-0" .Capabilities.KubeVersion.Version) -}}
policy/v1
{{- else -}}
policy/v1beta1
{{- end -}}
{{- end -}}

{{- define "loraplex.autoscalingApi" -}}
{{- if and (.Capabilities.APIVersions.Has "autoscaling/v2") (semverCompare ">=1.23-0" .Capabilities.KubeVersion.Version) -}}
autoscaling/v2
{{- else -}}
autoscaling/v2beta2
{{- end -}}
{{- end -}}

{{- define "loraplex.workloadApi" -}}
{{- ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" (eq .Values.workload.kind "LeaderWorkerSet") -}}
{{- end -}}

{{/* Where the kubelet cannot sleep by itself, the image's program does. */}}
{{- define "loraplex.preStop" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version -}}
sleep:
  seconds: {{ .Values.preStopSeconds }}
{{- else -}}
exec:
  command: [sleep, {{ .Values.preStopSeconds | toString | quote }}]
{{- end -}}
{{- end -}}
