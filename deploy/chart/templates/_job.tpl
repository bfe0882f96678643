{{/* Prefect's base job template: what each run's job is made of. `{{ name }}` are Prefect's own variables. */}}
{{- define "ratchet.jobTemplate" -}}
variables:
  type: object
  properties:
    name: { type: string, title: Name, description: Name of the job and its pod }
    command: { type: string, title: Command, description: What to run in place of the flow's own command }
    env: { type: object, title: Environment, additionalProperties: { type: string } }
    labels: { type: object, title: Labels, additionalProperties: { type: string } }
    image: { type: string, title: Image, default: {{ include "ratchet.image" (dict "root" . "own" .Values.jobs.image) | quote }} }
    gpus: { type: integer, title: GPUs, default: {{ .Values.jobs.gpus }} }
    job_watch_timeout_seconds: { type: integer, title: Seconds without an event after which a job counts as lost }
    pod_watch_timeout_seconds: { type: integer, title: Seconds until the pod runs, default: 600 }
    stream_output: { type: boolean, title: Show the job's output in the worker's log, default: true }
job_configuration:
  name: {{ "\"{{ name }}\"" }}
  command: {{ "\"{{ command }}\"" }}
  env: {{ "\"{{ env }}\"" }}
  labels: {{ "\"{{ labels }}\"" }}
  namespace: {{ .Release.Namespace }}
  job_watch_timeout_seconds: {{ "\"{{ job_watch_timeout_seconds }}\"" }}
  pod_watch_timeout_seconds: {{ "\"{{ pod_watch_timeout_seconds }}\"" }}
  stream_output: {{ "\"{{ stream_output }}\"" }}
  job_manifest:
    apiVersion: batch/v1
    kind: Job
    metadata:
      namespace: {{ .Release.Namespace }}
      generateName: {{ "\"{{ name }}-\"" }}
      labels: {{ "\"{{ labels }}\"" }}
    spec:
      backoffLimit: 0 # Prefect decides whether a run is tried again
      ttlSecondsAfterFinished: {{ .Values.jobs.secondsToKeep }}
      template:
        metadata:
          labels: {{- include "ratchet.labels" (dict "root" . "part" "job") | nindent 12 }}
        spec:
          restartPolicy: Never
          automountServiceAccountToken: false
          securityContext: {{- include "ratchet.podSecurity" . | nindent 12 }}
          {{- with .Values.imagePullSecrets }}
          imagePullSecrets: {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with .Values.jobs.nodeSelector }}
          nodeSelector: {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with .Values.jobs.tolerations }}
          tolerations: {{- toYaml . | nindent 12 }}
          {{- end }}
          containers:
            - name: prefect-job
              image: {{ "\"{{ image }}\"" }}
              imagePullPolicy: {{ .Values.image.pullPolicy }}
              args: {{ "\"{{ command }}\"" }}
              workingDir: /project
              securityContext: {{- include "ratchet.containerSecurity" . | nindent 16 }}
              {{- include "ratchet.environmentFrom" . | nindent 14 }}
              env: {{- include "ratchet.flowEnv" . | nindent 16 }}
              resources:
                requests: {{- toYaml .Values.jobs.resources.requests | nindent 18 }}
                limits:
                  {{- toYaml .Values.jobs.resources.limits | nindent 18 }}
                  {{ .Values.jobs.gpuResource }}: {{ "\"{{ gpus }}\"" }}
              volumeMounts:
                - name: project
                  mountPath: /project
                - name: shm
                  mountPath: /dev/shm
                {{- include "ratchet.scratchMounts" . | nindent 16 }}
                {{- include "ratchet.sshMount" . | nindent 16 }}
          volumes:
            {{- include "ratchet.projectVolume" . | nindent 12 }}
            - name: shm
              emptyDir: { medium: Memory, sizeLimit: {{ .Values.jobs.sharedMemory }} }
            {{- include "ratchet.scratchVolumes" . | nindent 12 }}
            {{- include "ratchet.sshVolume" . | nindent 12 }}
{{- end }}
