{{/* Names and labels. */}}

{{- define "loraplex.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 characters leave room for what StatefulSets and our own suffixes add. */}}
{{- define "loraplex.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "loraplex.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.instanceLabels" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What finds the servers, and nothing else of the release. */}}
{{- define "loraplex.selectorLabels" -}}
{{ include "loraplex.instanceLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Labels of an object; called with a list of the root and the component. */}}
{{- define "loraplex.labelsOf" -}}
{{- $root := index . 0 -}}
{{ include "loraplex.instanceLabels" $root }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/part-of: loraplex
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- with $root.Chart.AppVersion }}
app.kubernetes.io/version: {{ . | quote }}
{{- end }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{- include "loraplex.labelsOf" (list . "server") -}}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "loraplex.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* production-stack's operator looks for a container port of this name. */}}
{{- define "loraplex.portName" -}}
{{- ternary "container-port" .Values.containerPortName .Values.productionStack.enabled -}}
{{- end -}}
