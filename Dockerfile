# refshard with the versions of requirements.lock, for NVIDIA GPUs. In the clone:
#
#   docker build --tag refshard:0.1 .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/data" --env XDG_CACHE_HOME=/data/.cache \
#     refshard:0.1 train --config run.yaml
#
# XDG_CACHE_HOME keeps what is fetched from the hub, and the digests of weights, for the next command.
# torch's wheel brings the libraries of CUDA; the base adds what the container runtime needs to hand in the driver.
# Rocky Linux 9 has the Python that the locked versions were tested with.
FROM nvidia/cuda:13.0.1-base-rockylinux9

# Triton compiles each kernel's launcher with a C compiler and Python's headers. The distribution keeps one version of each
# package, so another build of it must not ask for an older one.
# hadolint ignore=DL3041
RUN dnf install --assumeyes --nodocs --setopt=install_weak_deps=False \
      gcc python3.11 python3.11-devel python3.11-pip shadow-utils \
 && dnf clean all \
 && rm -rf /var/cache/dnf \
 && useradd --uid 1000 --create-home refshard \
 && chmod 1777 /home/refshard

# One layer of 6 GB that changes with the lock alone, so that a change of refshard moves only the small one above it.
# pip compiles the modules: the image's user can't write here, so each process would compile them, which takes 25 s.
COPY requirements.lock /usr/src/refshard/
RUN python3.11 -m venv /opt/refshard \
 && /opt/refshard/bin/pip install --no-cache-dir --require-hashes \
      --requirement /usr/src/refshard/requirements.lock

COPY LICENSE README.md pyproject.toml /usr/src/refshard/
COPY pipeline /usr/src/refshard/pipeline
COPY stages /usr/src/refshard/stages
RUN /opt/refshard/bin/pip install --no-cache-dir --no-deps --no-build-isolation /usr/src/refshard

# USER is what Python takes for the name of a user whom the image does not know (--user).
ENV PATH=/opt/refshard/bin:$PATH HOME=/home/refshard USER=refshard
USER 1000
WORKDIR /data
ENTRYPOINT ["refshard"]
CMD ["--help"]
