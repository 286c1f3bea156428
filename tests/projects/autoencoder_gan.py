"""An autoencoder of digits whose reconstructions a critic tells from real ones: two optimizers, in turn, by hand."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset


class Encoder(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.mean, self.spread = nn.Linear(128, latent), nn.Linear(128, latent)

    def forward(self, images):
        x = F.leaky_relu(self.norm(self.conv(images)), 0.2).flatten(1)
        return self.mean(x), self.spread(x).clamp(-4, 4)


class Critic(nn.Sequential):
    def __init__(self):
        super().__init__(
            spectral_norm(nn.Conv2d(1, 8, 3, stride=2, padding=1)), nn.LeakyReLU(0.2), nn.Flatten(),
            spectral_norm(nn.Linear(128, 1)),
        )  # fmt: skip


class AutoencoderGAN(L.LightningModule):
    def __init__(self, latent=8, lr=1e-2, adversarial=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.encoder, self.critic = Encoder(latent), Critic()
        self.decoder = nn.Sequential(
            nn.Linear(latent, 128), nn.Unflatten(1, (8, 4, 4)), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def sample(self, mean, spread):
        return mean + torch.randn_like(mean) * (spread / 2).exp() if self.training else mean

    def training_step(self, batch, batch_idx):
        (images,) = batch
        of_generator, of_critic = self.optimizers()
        self.toggle_optimizer(of_generator)
        made = torch.sigmoid(self.decoder(self.sample(*self.encoder(images))))
        fooled = F.softplus(-self.critic(made)).mean()
        loss = F.mse_loss(made, images) + self.hparams.adversarial * fooled
        of_generator.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(of_generator, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_critic)
        judged = F.softplus(-self.critic(images)).mean() + F.softplus(self.critic(made.detach())).mean()
        of_critic.zero_grad()
        self.manual_backward(judged)
        of_critic.step()
        self.untoggle_optimizer(of_critic)
        self.log_dict({"train/generator": loss, "train/critic": judged}, prog_bar=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def reconstruct(self, images):
        return torch.sigmoid(self.decoder(self.encoder(images)[0]))

    def validation_step(self, batch, batch_idx):
        self.log("val/error", F.mse_loss(self.reconstruct(batch[0]), batch[0]))

    def test_step(self, batch, batch_idx):
        self.log("test/error", F.mse_loss(self.reconstruct(batch[0]), batch[0]))

    def predict_step(self, batch, batch_idx):
        return self.reconstruct(batch[0])

    def configure_optimizers(self):
        of_generator = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizers = [torch.optim.Adam(of_generator, lr=self.hparams.lr, betas=(0.5, 0.999)),
                      torch.optim.Adam(self.critic.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))]  # fmt: skip
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


def digits():
    return TensorDataset(torch.tensor(load_digits().images[:900], dtype=torch.float32).unsqueeze(1) / 16)


def train(*callbacks, **options):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_epochs=4, callbacks=[*callbacks], **options)
    model = AutoencoderGAN()
    trainer.fit(model, DataLoader(digits(), 50, shuffle=True), DataLoader(digits(), 100))
    return trainer, model
