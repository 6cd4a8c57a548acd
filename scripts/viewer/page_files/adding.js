// More photographs, where a server is behind the page.

// Why it could not be added; nothing where it was.
async function add(blob, name) {
  element("status").textContent = `${name} ...`;
  try {
    const reply = await fetch("photos", { method: "POST", headers: { "X-Name": encodeURIComponent(name) }, body: blob });
    const said = await reply.json();
    if (!reply.ok) throw new Error(said.error);
    photos.push(said);
    start(photos.length - 1);
    return "";
  } catch (error) {
    return `${name}: ${error.message}`;
  }
}

async function addAll(files) {
  const errors = [];
  for (const [file, name] of files) errors.push(await add(file, name));
  element("status").textContent = errors.filter(Boolean).join("; ");
}

const named = (files) => [...files].map((file) => [file, file.name]);

async function toggleWebcam() {
  const video = element("video"), isOn = video.srcObject !== null;
  if (isOn) {
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  } else {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
      await video.play();
    } catch (error) {
      element("status").textContent = `no webcam: ${error.message}`;
      return;
    }
  }
  video.hidden = element("frame").hidden = isOn;
}

async function takeFrame() {
  const video = element("video"), canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  await addAll([[await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }), `frame ${photos.length + 1}`]]);
}

element("files").addEventListener("change", async (event) => {
  await addAll(named(event.target.files));
  event.target.value = "";
});
if (page.served) {
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    addAll(named(event.dataTransfer.files));
  });
  addEventListener("paste", (event) => addAll(named(event.clipboardData.files)));
}
element("webcam").addEventListener("click", toggleWebcam);
element("frame").addEventListener("click", takeFrame);
