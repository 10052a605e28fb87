# The trainer of language models: torch for CUDA, what requirements/llm.txt pins, and llama.cpp.
# Built by cloudbuild.yaml with the repository as its context; .dockerignore lets nothing else in.
#
# Which CUDA. Cloud Run's L4 has driver 535 (CUDA 12.2). That runs any CUDA 12 build, by CUDA's minor version compatibility, and
# no CUDA 13 build. torch 2.13 comes for CUDA 12.6, 13.0 and 13.2; its builds for 12.8 ended with 2.11. The 12.6 build has code
# for every GPU up to Hopper, so for the L4 (8.9, by that of 8.6), and none for Blackwell: for the RTX PRO 6000 (12.0, driver
# 580) cloudbuild.yaml builds this file once more, as `llm-cuda13`, with another BASE. Without a GPU either works.
#
# The bases are PyTorch's own, pinned by digest; `docker buildx imagetools inspect` with the tag prints the digest of today.
# They bring Python 3.12, for which every pin has a wheel; the trainer's tests run on 3.11.
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime@sha256:6acf597eeb8e376a96580dde4952f37cc017fef732bb40bfc73f28f25e3f64b4

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# On top of the base's packages, torch among them. pip is the base's too, and stays out of the environment.
RUN python3 -m venv --without-pip --system-site-packages /opt/venv
WORKDIR /build

# Minutes, and it changes least, so it comes first. The script builds without native processor flags: the machine that builds
# is not the one that runs.
COPY infra/llama_cpp.sh infra/
RUN infra/llama_cpp.sh /opt/venv/bin/python

# The constraint is the version of torch that the base has: pip finds it there, and fetches no other build of it.
COPY requirements/llm-constraints.txt requirements/llm.txt requirements/
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
    --constraint requirements/llm-constraints.txt --requirement requirements/llm.txt

COPY LICENSE /app/
COPY schema/ /app/schema/
COPY storage/ /app/storage/
COPY jobs/ /app/jobs/
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE}
# The environment that the tests know has neither, and transformers behaves differently where it finds one.
RUN python3 -m pip uninstall --yes --break-system-packages torchvision torchaudio

# Layers in the order in which they change: the libraries with the requirements, the code with every commit.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app

# An attempt writes below /tmp only, which on Cloud Run is memory. USER: some libraries ask for a name, and 10001 has none.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=tunesmith \
    HF_HOME=/tmp/huggingface \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /app

# What only a run would show: torch is the base's build for CUDA, all parts load together, and Triton has its C compiler.
RUN python -c "import llama_cpp, peft, torch, transformers, trl; assert torch.version.cuda and not torch.__file__.startswith('/opt/venv')" \
    && command -v gcc

# What run.json says trained a model. Last, since it is another one every time.
ARG IMAGE=
ENV JOB_IMAGE=$IMAGE

USER 10001:10001

# An attempt serves nobody: it reports to the service, which asks Cloud Run about one that has gone silent.
HEALTHCHECK NONE

# Without a shell in between, so that SIGTERM arrives; the launcher adds `--name JOB.ATTEMPT`.
ENTRYPOINT ["python", "-m", "jobs.run"]
