{{- define "ratchet.name" -}}
{{ printf "%s-%s" .root.Release.Name .part | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "ratchet.labels" -}}
app.kubernetes.io/name: ratchet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "ratchet.image" -}}
{{ .own | default (printf "%s:%s" .root.Values.image.repository (toString .root.Values.image.tag)) }}
{{- end }}

{{/* Of a pod: an ordinary user, and the system calls that the runtime allows by default. */}}
{{- define "ratchet.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.user }}
runAsGroup: {{ .Values.podSecurity.user }}
fsGroup: {{ .Values.podSecurity.user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "ratchet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/* What is written beside the project: with a read-only root, only these folders. */}}
{{- define "ratchet.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: state
  emptyDir: {}
{{- end }}

{{- define "ratchet.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/ratchet
- name: state
  mountPath: /var/lib/ratchet
{{- end }}

{{- define "ratchet.projectVolume" -}}
- name: project
  persistentVolumeClaim:
    claimName: {{ .Values.project.existingClaim | default (include "ratchet.name" (dict "root" . "part" "project")) }}
{{- end }}

{{- define "ratchet.fromSecret" -}}
valueFrom:
  secretKeyRef: { name: {{ .root.Values.existingSecret }}, key: {{ .key }} }
{{- end }}

{{/* Folders that a library would otherwise look for beside its code or in /var. */}}
{{- define "ratchet.folders" -}}
HOME: /home/ratchet
DVC_SITE_CACHE_DIR: /tmp/dvc
{{- end }}

{{/* The environment of every process that runs flows: the worker's and its jobs'. */}}
{{- define "ratchet.flowEnvironment" -}}
{{ include "ratchet.folders" . }}
MLFLOW_TRACKING_URI: http://{{ include "ratchet.name" (dict "root" . "part" "mlflow") }}:5000
PREFECT_API_URL: http://{{ include "ratchet.name" (dict "root" . "part" "prefect") }}:4200/api
PREFECT_RUNNER_POLL_FREQUENCY: "1"
MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT: "true" # MLflow would print links to a name that no browser knows
RATCHET_GATEWAY_URL: http://{{ include "ratchet.name" (dict "root" . "part" "gateway") }}:{{ .Values.gateway.service.port }}
RATCHET_ROOT: /project
{{- end }}

{{- define "ratchet.environmentFrom" -}}
{{- with .Values.existingEnvironmentSecret }}
envFrom:
  - secretRef: { name: {{ . }} }
{{- end }}
{{- end }}

{{- define "ratchet.flowEnv" -}}
{{- range $name, $value := include "ratchet.flowEnvironment" . | fromYaml }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
- name: PREFECT_API_AUTH_STRING
  {{- include "ratchet.fromSecret" (dict "root" . "key" "prefect-auth") | nindent 2 }}
- name: RATCHET_REQUEST_LOG_URL
  {{- include "ratchet.fromSecret" (dict "root" . "key" "requests-database-url") | nindent 2 }}
{{- with .Values.mlflow.s3Endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{ include "ratchet.gitSsh" . }}
{{- end }}

{{- define "ratchet.gitSsh" -}}
{{- if .Values.project.existingSshSecret -}}
- name: GIT_SSH_COMMAND
  value: ssh -i /etc/ratchet/ssh/ssh-privatekey -o UserKnownHostsFile=/etc/ratchet/ssh/known_hosts -o StrictHostKeyChecking=yes
{{- end }}
{{- end }}

{{- define "ratchet.sshMount" -}}
{{- if .Values.project.existingSshSecret -}}
- name: ssh
  mountPath: /etc/ratchet/ssh
  readOnly: true
{{- end }}
{{- end }}

{{- define "ratchet.sshVolume" -}}
{{- if .Values.project.existingSshSecret -}}
- name: ssh
  secret:
    secretName: {{ .Values.project.existingSshSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}
